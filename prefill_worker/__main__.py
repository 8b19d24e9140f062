"""`python -m prefill_worker`: the same flags as `twostroke prefill-worker`."""

from cli.main import main

if __name__ == "__main__":
    main("prefill-worker")
