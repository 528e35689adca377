"""The report of a run: what it reached, what it cost, which clients it served badly, and how to load the result.

`page` writes one HTML file about one run or several, `heterogeneity_page` one about a federation's texts before training.
Both are made in three steps. `run_log` reads a run folder as a value, its many lines as columns (`line_table`). `facts`,
`timeline`, `rank_facts`, `label_facts` and `tables` reckon numbers, sentences and tables from it; each number is reckoned once, so
that pictures, tables and sentences agree. The `figures_*` modules draw (matplotlib is imported when the first picture is drawn),
and `sections` says what stands where.

A new fact goes to `facts`, `timeline`, `rank_facts` or `label_facts`, its table to `tables`, its picture to `figures_*`;
`sections.run_sections` then names it. The package imports `data`, `core` and the metrics of `train.confusion`, and never `runs` or
`simulate`: all it knows of a run is in its folder.
"""
