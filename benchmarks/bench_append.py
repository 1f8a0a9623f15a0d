"""bench_append.c's twin: appending a row from Python, against concatenating."""

from bench import twin

if __name__ == "__main__":
    twin("append")
