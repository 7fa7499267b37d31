"""What people look at: model cards, figures and tables, made from the files of a run."""
