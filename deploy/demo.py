"""What `make demo` runs against the cluster: a short chat in two turns, and how long each phase of them took."""

import os
import time

from twostroke import Client, Finish, Message

QUESTIONS = ("What is the capital of France?", "Name three famous sights there.")


def main() -> None:
    talk: list[Message] = []
    finishes: list[Finish] = []
    with Client(os.environ.get("TWOSTROKE_TARGET", "localhost:8600")) as client:
        for question in QUESTIONS:
            talk.append({"role": "user", "content": question})
            print(f"\n> {question}")
            answer = ""
            for piece in client.stream_chat(talk, max_tokens=100, temperature=0):
                print(piece.text, end="", flush=True)
                answer += piece.text
                if piece.finish:
                    finishes.append(piece.finish)
            print()
            talk.append({"role": "assistant", "content": answer})
        time.sleep(0.1)  # workers say what they hold 20 times a second
        workers = client.load().workers
    columns = (("turn", 4), ("prompt", 7), ("cached", 7), ("output", 7), ("first token", 13), ("KV transfer", 13))
    print("\n" + "".join(f"{name:>{width + 1}}" for name, width in (*columns, ("each token", 12))))
    for turn, finish in enumerate(finishes, start=1):
        usage, timing = finish.usage, finish.timing
        each_ms = timing.decode_ms / max(1, usage.completion_tokens - 1)
        print(
            f"{turn:>5}{usage.prompt_tokens:>8}{usage.prefill_cached_tokens:>8}{usage.completion_tokens:>8}"
            f"{timing.first_token_ms:>11.1f} ms{timing.transfer_ms:>11.2f} ms{each_ms:>10.1f} ms"
        )
    held, total = sum(worker.blocks.in_use for worker in workers), sum(worker.blocks.total for worker in workers)
    print(f"\n{len(workers)} workers; {held} of their {total} KV blocks are in use now")


if __name__ == "__main__":
    main()
