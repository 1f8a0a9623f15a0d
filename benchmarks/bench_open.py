"""bench_open.c's twin: opening and closing a tensor, with the driver calls counted."""

from bench import twin

if __name__ == "__main__":
    twin("open")
