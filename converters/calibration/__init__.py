"""What a quantised model must not lose, measured on medical questions about images: calibration.

    calibration = calibrate(checkpoint, samples, DataRecord(...))     # statistics of every linear layer's input; torch, float32
    choice = choose_types(checkpoint, recipe, calibration)            # the mixture with the least loss in so many bytes

Reference (reference.py, tokens.py) is the checkpoint as transformers runs it; gather.py runs it over questions; rounding.py writes
blocks whose errors cancel out on what was seen; search.py chooses types. torch and transformers are imported inside functions only.
"""
