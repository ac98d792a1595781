"""``python -m tl_looped`` and ``accelerate launch -m tl_looped``: the command line."""

from tl_looped.cli import main

if __name__ == "__main__":
    main()
