"""The `sharpprior` command."""


def main() -> None:
    """Entry point of the console script."""
    from train.cli.app import main as run  # here, so that other wings' tests import this one for nothing

    run()
