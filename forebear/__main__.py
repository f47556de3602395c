"""``python -m forebear``: the command line, where the script ``forebear`` is not on the path."""

from forebear.cli.main import main

if __name__ == "__main__":
    main()
