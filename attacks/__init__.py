"""Membership attacks and their statistics on score tables: NumPy only, no model, no accelerator.

    tables       read score tables                      statistics  AUC, DeLong, TPR at fixed FPR, resampling
    membership   the table of all attacks, their ids    signals     attacks on one pass of one model
    camia        signals along the text                 against_reference, changed_text, fitted, twohop, trajectory
    scoring      runs the attacks on the tables         study       scores of all models, by role pair
    blind        classifiers that see the text alone    rows        membership.csv, roc.parquet
    exposure     exposure.csv: canaries                 dataset_inference  dataset.csv: was this set trained on?
    differences  differences.csv                        ranking     which technique leaks more, from several seeds
    gates        gates.csv                              utility     utility.csv and its gate
    ledger       ledger.parquet                         summary     summary.json
    audit        all of the above, in order             report      figures and the page

`python -m attacks SCORES_DIR --out=DIR` runs the whole of it.
"""
