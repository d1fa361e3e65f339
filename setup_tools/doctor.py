"""`python -m setup_tools.doctor`: the rows of `pgolf doctor`, from a checkout whose command line does not start."""

from pgolf.doctor import report


def main() -> None:
    for name, found in report():
        print(f"{name:<26} {found}")


if __name__ == "__main__":
    main()
