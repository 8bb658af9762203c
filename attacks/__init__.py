"""Membership attacks and their statistics on score tables: NumPy only, no model, no accelerator.

    tables       read score tables                      statistics  AUC, DeLong, TPR at fixed FPR, resampling
    membership   the attacks                            blind       classifiers that see the text alone
    study        scores of all models, by role pair     rows        membership.csv, roc.parquet
    differences  differences.csv                        ranking     which technique leaks more, from several seeds
    gates        gates.csv                              utility     utility.csv and its gate
    ledger       ledger.parquet                         summary     summary.json
    audit        all of the above, in order             report      figures and the page

`python -m attacks SCORES_DIR --out=DIR` runs the whole of it.
"""
