"""Models with siblings, each as an author writes it and once more written wide by hand.

The second is made from the first, with the same weights: `Wide...(plain)`. What both share, such
as a stem, is one object there, since only one of the two is used at a time.
"""
