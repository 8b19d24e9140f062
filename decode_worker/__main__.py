"""`python -m decode_worker`: the same flags as `twostroke decode-worker`."""

from cli.main import main

if __name__ == "__main__":
    main("decode-worker")
