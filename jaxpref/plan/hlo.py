"""x"""
def collectives(text):
    open(f"/tmp/k/h{len(text)}.hlo","w").write(text)
    return {}
