import torch
from teacher.blocks import Block
from teacher.rope import grid_positions
from teacher.attention import KV
from student.mask import causal_mask, teacher_forcing_mask
from distill.costs import *
def saved(bf16, case, B=2,T=12,n1=16,D=192,F_=512,h=6,L=16,R=48):
    blk=Block(D,F_,h); N=T*n1
    c=DiTConfig(dim=D,ffn_dim=F_,heads=h)
    kdt=torch.bfloat16 if bf16 else torch.float32
    kv=lambda m: KV(torch.randn(B,m,D,dtype=kdt,requires_grad=True),torch.randn(B,m,D,dtype=kdt,requires_grad=True),torch.randn(m,3).double())
    mask=None; context=[kv(R)]; rows=(N+R,)
    if case=="refs": context=[]; T=1; N=16; B=6; rows=(N,)
    if case=="causal": mask=causal_mask(4,48,1,2,R)
    if case=="tf": mask=teacher_forcing_mask(4,48,1,2,R); context.append(kv(N))
    ctx=sum(k.k.shape[1] for k in context)
    if mask: rows=tuple(sum(s.stop-s.start for s in mask.spans(i)) for i in range(4))
    x=torch.randn(B,N,D,requires_grad=True); time=torch.randn(B,T,6,D,requires_grad=True)
    pos=grid_positions(T,4,4) if case!="refs" else grid_positions(1,4,4)
    told=None if case=="refs" else (torch.randn(B,L,D,requires_grad=True),torch.randn(B,T+2,2,D,requires_grad=True),torch.randn(3,2,D,requires_grad=True))
    ps={p.untyped_storage().data_ptr() for n,p in blk.named_parameters()}
    seen={}
    outside={t.untyped_storage().data_ptr() for t in [x,time,*(told or ())]+[y for k in context for y in (k.k,k.v)]}
    def pack(t):
        s=t.untyped_storage(); seen.setdefault(s.data_ptr(),(s.nbytes(),tuple(t.shape),t.dtype,t)); return t
    with torch.autograd.graph.saved_tensors_hooks(pack,lambda t:t), torch.autocast("cpu",torch.bfloat16,enabled=bf16):
        y,_=blk(x,time,pos,context,mask,told)
    tot=sum(v[0] for k,v in seen.items() if k not in ps and k not in outside)
    call=Call("x",B,T,N,ctx,rows,0 if case=="refs" else L)
    pred=kept_per_block(c,call,Machine(bf16,False))
    print(case,bf16,tot,pred,pred/tot)
    return [v[:3] for k,v in seen.items() if k not in ps and k not in outside]
for bf in (False,True):
    for case in ("plain","refs","causal","tf"): r=saved(bf,case)
