"""Make model cards, figures and tables from the files of a run."""
