"""`python -m vamo_ft`, the form that `accelerate launch -m` and `torchrun -m` need."""

from vamo_ft.cli import main

if __name__ == "__main__":
    main()
