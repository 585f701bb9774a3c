"""Entry point of the `macaw` script and of ``python -m macaw_server``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say which extra is missing."""
    try:
        from macaw_server.cli import app
    except ModuleNotFoundError as e:
        sys.exit(f"macaw: the package {e.name} is not installed. Install the server: pip install 'macaw[server]'")
    app(prog_name="macaw")


if __name__ == "__main__":
    main()
