"""How good scores are: labelled data, figures with intervals, and the baselines to beat.

data       JSON lines -> LabelledText
detection  scores and labels -> AUROC, TPR at a fixed false-positive rate, tables
baselines  keywords, length, TF-IDF with logistic regression
"""
