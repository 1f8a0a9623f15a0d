"""bench_grow.c's twin: taking rows into use from Python. pyvmm/_bench.py has it."""

from bench import twin

if __name__ == "__main__":
    twin("grow")
