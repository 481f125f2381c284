"""`python -m hyconvert`."""

from hyconvert.cli import main

main()
