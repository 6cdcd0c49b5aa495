"""Studies: several recipes with several seeds from one YAML file, and a report with intervals.

study_file  YAML                 -> arms, seeds, data to make, measures
plan        a study              -> its runs and data, in dependency order
estimate    a plan               -> remaining steps and their time
made_data   a plan's data        -> files
run         a plan               -> outcome of each step
policies    a finished run       -> scored samples, results of tasks
measures    metrics.jsonl        -> a run's numbers
statistics  numbers of seeds     -> intervals, differences, win rates, slopes
results     all of the above     -> results.json
figures     numbers              -> SVG
report      results.json, curves -> a document; run_report does the same for one run
document    a document           -> Markdown, HTML
"""
