"""From a dataset to batches: streams of tasks, their images, augmentation and the collator."""
