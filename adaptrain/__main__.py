"""`python -m adaptrain`: the same command as `train.py`, from an installed adaptrain."""

from adaptrain.app.train import main

if __name__ == "__main__":
    main()
