"""What the HTML pages share: one file each, that asks nobody for anything.

document   a template, a style and perhaps a script -> the page, under a policy that names them
svg        axes, lines and texts of inline charts
base.css   the look of tables, charts and tokens
"""
