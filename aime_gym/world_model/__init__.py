"""The RSSM and its three verbs: observe, imagine, evidence."""
