from lsag_cli.start import stopping_at_once


def main() -> None:
    """Run the command line."""
    with stopping_at_once():
        from lsag_cli import app
    app.main()


if __name__ == "__main__":
    main()
