"""Start the demo: python app/app.py, then open the address it prints; it takes the options of
``diffalign app``."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["app"]
    main()
