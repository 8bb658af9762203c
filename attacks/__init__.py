"""Membership attacks and their statistics on score tables: NumPy only, no model, no accelerator.

    tables      read score tables                     statistics  AUC, DeLong, TPR at fixed FPR, resampling
    membership  the attacks                           blind       classifiers that see the text alone
    study       scores of all models, by role pair    rows        membership.csv, differences.csv, roc.parquet
    gates       gates.csv and utility.csv             summary     summary.json
    audit       all of the above, in order            report      figures and the page

`python -m attacks SCORES_DIR --out=DIR` runs the whole of it.
"""
