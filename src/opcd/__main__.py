"""`python -m opcd`, and `accelerate launch --module opcd`: the command line."""

from opcd.cli import main

if __name__ == "__main__":
    main()
