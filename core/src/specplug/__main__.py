"""`python -m specplug` is the command `specplug`."""

from specplug.cli.main import main

if __name__ == "__main__":
    main()
