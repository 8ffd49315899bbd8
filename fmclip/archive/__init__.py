"""Archives of a million scans and more: scored by workers on one machine or many, and looked at for drift.

manifest   tables and shards, cut into parts      scorer   what a worker does with a part
parts      the files of a part                    run      Ray Data: plan, resume, progress
drift      scores by scanner and day: table and figure
cluster    Ray itself: reached or started, and whether there is room for the workers
"""
