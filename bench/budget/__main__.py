"""The study of `python -m bench.budget`: what a budget of rows costs in quality, and what it saves in time."""

from bench.budget.command import main

if __name__ == "__main__":  # processes of a pool import this file too
    main()
