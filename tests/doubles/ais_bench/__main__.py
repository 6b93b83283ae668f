"""`python -m ais_bench` of the stand-in."""

from ais_bench_cli import main

main()
