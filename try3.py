import torch,sys,time
sys.path.insert(0,'tests')
from helpers import make_model, packed, padded_arrays, tiny_config
from bert_pretraining import config
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.step_choice import prepared_step
ALONE=Ranks(0,1,torch.device('cpu'))
for batching,prov,dr in (('balanced','torch',0.),('balanced','torch',.1),('random','torch',.1)):
    chosen=config.resolve({"compile":"on","batching":batching,"train_batch_size":6,"static_tokens":200,"prove_kernels":"on"}).config
    m=make_model(tiny_config(num_hidden_layers=1,max_position_embeddings=64,hidden_dropout_prob=dr,attention_probs_dropout_prob=dr),prov)
    import bert_pretraining.training.step_choice as sc, bert_pretraining.training.step_proof as sp
    real=sp.difference
    def spy(*a):
        r=real(*a); print('difference',r); return r
    sc.difference=spy
    said=[]
    t=time.time()
    st=torch.get_rng_state()
    s=prepared_step(chosen,m,64,ALONE,said.append,lambda:m.zero_grad(set_to_none=False))
    assert torch.equal(st,torch.get_rng_state())
    print(time.time()-t,said,s._model is m)
