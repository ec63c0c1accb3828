VERIFIED = 0.5
def probability(registration, name):
    return 0.0 if registration is None else float(registration.inliers>=30)
