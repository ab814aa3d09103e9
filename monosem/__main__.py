"`python -m monosem` runs the `monosem` command."
from monosem.cli import main

if __name__ == '__main__': raise SystemExit(main())
