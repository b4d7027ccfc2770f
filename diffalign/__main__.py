"""``python -m diffalign`` is the command line."""

from diffalign.cli import main

if __name__ == "__main__":
    main()
