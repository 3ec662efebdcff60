"""Accuracy of the very artifact that a clinic runs, on medical VQA sets: the field's protocols, a strict one, and how sure it may be.

    with EngineTarget(artifact) as target:              # targets.py; also a server, or transformers (reference.py)
        replies = run(target, samples, folder=out)      # runner.py: a group an image, survives a SIGKILL
    result = build_result(samples, [r.text for r in replies], [r.score for r in replies])       # results.py

protocols.py has the metrics, looks.py the images that should change an answer, confidence.py calibration and the referral rule,
leakage.py what a split shares with training, predictions.py the field's prediction files. Knows no llama.cpp: it asks an engine.
"""
