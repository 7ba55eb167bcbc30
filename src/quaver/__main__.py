"""``python -m quaver`` is the program ``quaver``."""

from quaver.cli import main

main()
