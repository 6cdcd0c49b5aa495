"""Studies: several recipes with several seeds from one YAML file, and a report with intervals.

study_file  YAML                 -> arms, seeds, data to make, what is measured
plan        a study              -> its runs and data, in the order that their references ask for
estimate    a plan               -> what is left of it, and how long that may take
made_data   a plan's data        -> files
run         a plan               -> how each step ended
policies    a finished run       -> scored samples, results of tasks
measures    metrics.jsonl        -> a run's numbers
statistics  numbers of seeds     -> intervals, differences, win rates, slopes
results     all of that          -> results.json
figures     numbers              -> SVG
report      results.json, curves -> a document; run_report: the same of one run
document    a document           -> Markdown, HTML
"""
