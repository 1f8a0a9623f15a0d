"""Time per token and memory against length; pyvmm/_bench.py has it, the plots come from it."""

from bench import twin

if __name__ == "__main__":
    twin("length")
