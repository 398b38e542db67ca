"""Run calibration as ``python -m calibrate``, as torchrun does on every rank."""

from calibrate.app import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
