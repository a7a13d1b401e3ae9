"""`python -m edgepack`: the command line, for where the script is not on the path."""

from edgepack.cli import main

if __name__ == "__main__":
    main()
