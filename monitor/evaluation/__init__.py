"""How good a bundle is on labelled texts, measured through the code that serves.

result    what is written as JSON, field by field; its version
scored    rows -> traces -> the policy's decisions -> arrays
figures   arrays -> figures beside the baselines
battery   the same under disguises: how fragile a score is
unseen    heads fitted anew without each source
run       all of it, in order; read this first
charts, page   the result as one HTML file
"""
