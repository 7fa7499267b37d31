"""Turn a dataset into batches: streams of tasks and their scenarios, images, augmentation and the collator."""
