"""A region: the server of its own sites and a site of the server above it. It imports the driver (`server`) and the border of a site
(`site`), since it is both.
"""
