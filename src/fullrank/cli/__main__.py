"""``python -m fullrank.cli``: the command, for a process that starts itself again."""

from fullrank.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
