"""Start the demo: python app/app.py, then open the address it prints."""

from diffalign.app.ui import Demo, build

if __name__ == "__main__":
    build(Demo()).queue().launch()
