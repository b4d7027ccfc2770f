"""Start the demo: python app/app.py, then open the address it prints."""

from diffalign.app.page import build

if __name__ == "__main__":
    build().queue().launch()
