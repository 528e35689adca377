"""The command line: reads arguments, calls the other rooms, and prints. The only room that imports typer and rich.

Each command is a module of its name, and `main` knows them all. What several share: `options` and `table_options`, `run_view` and
`tables` (what is shown of a run), `console` (all that is printed passes there), `command_group`, `stop_signals` and `exit_codes`.
"""
