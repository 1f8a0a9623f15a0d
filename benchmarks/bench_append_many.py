"""bench_append_many.c's twin: a row to each of several tensors at once."""

from bench import twin

if __name__ == "__main__":
    twin("append_many")
