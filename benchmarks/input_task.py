"""What the peers of input_pipeline.py have to do."""

SIZE, FILE_BATCH = 224, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARRAYS, ARRAY_BATCH = (60_000, 28, 28, 1), 256
