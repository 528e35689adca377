"""The command line: reads arguments, calls the other rooms, and prints. The only room that imports typer and rich.

`main` has the commands for one machine, `deploy` and `keys` those of a deployment, `inspect` the one that describes data, `demo` the
run of `fedloom demo`; `tables` draws.
"""
